"""Complete training runs as lists of `cogvideo` commands: what to run for given data and machine, and how."""
