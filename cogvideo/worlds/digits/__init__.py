"""Moving digits: rendering, files, probes and the benchmark."""
