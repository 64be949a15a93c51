"""`python -m glm3cli`: the same program as `glm3`, and what torchrun starts on every rank."""

from glm3cli.cli.app import main

if __name__ == "__main__":  # dist_checkpointing spawns workers that import this module again
    main()
