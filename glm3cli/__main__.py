"""Starts the program: for `glm3`, for `python -m glm3cli`, and for torchrun on every rank."""

import gc
import os


def main() -> None:
    """Runs `cli.app.main`; a --help or a mistyped option is answered a tenth of a second sooner."""
    # The command line's classes are many objects and no garbage: not worth looking through.
    gc.disable()
    # Looking for plugins of pydantic, of which we have none, takes an import of email.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    # The device layer imports torch's extensions itself, in its order; where their libraries are
    # missing, importing torch would fail.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    from glm3cli.cli.app import main as run

    gc.freeze()
    gc.enable()
    try:
        run()
    finally:
        # The process ends: half a second would go into looking through torch's objects once more.
        gc.freeze()


if __name__ == "__main__":  # dist_checkpointing spawns workers that import this module again
    main()
