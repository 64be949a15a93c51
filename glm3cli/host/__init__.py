"""The machine around the program: files, signals, memory, and installed versions.

Begin with `files`, which writes a file as a whole or not at all and waits until it is on the disk.
`signals` turns SIGTERM into an exception for work on files, or holds signals back; training answers
them in its own way (train/signals.py). `memory` reads how much memory the machine or its container
has, and how much this process uses. `versions` reads the versions of installed packages without
importing them, and `imports` hastens the import of large ones. `fingerprints` recognises files by
their content, and `limits` meets those on open files and on the paths of sockets. `environment`
reads numbers that users and launchers set, `launcher` what torchrun or a cluster says of the ranks,
and `parsing` the files that people write.

Every other room may import this one. It imports nothing of ours but errors, and neither torch nor a
vendor's package; the chips are the business of device/.
"""
