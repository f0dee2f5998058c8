"""The command line: wiring only. `main` dispatches; each subcommand is one file with `add_arguments` and `run`."""
