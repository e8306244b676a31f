"""``python -m lvrpo``."""

from lvrpo.cli import run

if __name__ == "__main__":
    run()
