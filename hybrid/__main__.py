"""`python -m hybrid`, also under `accelerate launch -m hybrid`."""

from hybrid.cli import main

main()
