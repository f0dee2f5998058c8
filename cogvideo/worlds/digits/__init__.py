"""Moving digits: rendering, data sets, probes and the benchmark."""
