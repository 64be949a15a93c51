"""Files and folders of weights, whatever is in them: written completely or not at all, and checked.

Begin with `staging`, which gives a new folder its final name when it is complete. `digests`
computes the SHA-256 of files, also while they are being written. `manifest` writes and reads
glm3-manifest.json, which says where a folder comes from and what its files are.

This folder knows nothing of layouts, models or adapters, and imports none of its neighbours. The
readers of `layouts` use the manifest; conversions and training checkpoints use all three.
"""
