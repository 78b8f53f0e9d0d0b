"""``python -m mmtoken``, the same as the command ``mmtoken``."""

from .cli import main

if __name__ == '__main__':
    raise SystemExit(main())
