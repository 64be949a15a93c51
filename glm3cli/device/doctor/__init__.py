"""The doctor: what a machine has, whether it fits together, and what vendors' errors mean.

Begin with `machine.Machine`, which answers questions about a machine from its files, environment,
and package metadata, and `machine.Finding`, one line of the report. `cards` (NPUs and their
network), `versions` (torch, CANN, drivers) and `mindspeed` make findings of them, and `pins` has
the versions that fit together; `diagnose` is all
of `glm3 doctor`. A start on NPUs runs the same checks (`require_cards`, `require_versions`).
`codes.explain` turns an error text of an accelerator into a cause and a remedy, and `environment`
lists the variables that glm3 sets for NPUs.

No package of a vendor is imported here. device/npu/ and cli/ use this room; of ours it imports
only errors.
"""
