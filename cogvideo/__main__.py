"""`python -m cogvideo` is the `cogvideo` command; `deepspeed --module cogvideo ...` comes in here too."""

import sys

from cogvideo.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
