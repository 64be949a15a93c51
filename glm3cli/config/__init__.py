"""Everything that a user can set: one config class per command, frozen and strict.

Begin with `base`: a field of a `Settings` class is an option's flag, its YAML key, its default, its
limits, and its help text, all in one place. `model.ModelConfig` is the shape of a model, read from
its config.json (`glm` knows transformers' form of it); `parallel` holds the parallel sizes;
`training.TrainConfig` joins the classes of the room `options`. `convert`,
`preprocess`, `inference`, `evaluation`, `launch`, `doctor` and `demo` hold the other options. The
room `scripts` reads options out of ModelLink's shell scripts.

Every room may import these classes, and the command line turns them into options (`cli.options`).
They import only pydantic, `errors` and `host`, no torch and no numpy, so that `--help` and wrong
options are answered at once.
"""
