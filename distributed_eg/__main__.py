"""``python -m distributed_eg`` is the command ``distributed-eg``."""

from distributed_eg.cli import main

if __name__ == "__main__":
    main()
