"""Entry point of `python -m cogvideo`, which is the `cogvideo` command, and of `deepspeed --module cogvideo ...`."""

import sys

from cogvideo.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
