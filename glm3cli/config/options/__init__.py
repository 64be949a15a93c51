"""The options of a training run, one class for each concern, which `training.TrainConfig` joins.

`start` has the model to start from, `data` what is read, `batches` how samples of different lengths
make a batch, `loss` which of their tokens are trained, `preference` finetune's other methods,
`optimizer` AdamW and the learning rate, `lora` low-rank adapters, `partial` which weights are
trained, `megatron` what saves memory, `run` the folder of the run, `reporting` what is reported,
and `planning` the dry run. An option that `glm3 finetune` alone has says so by
`Flag(only="finetune")`.
"""
