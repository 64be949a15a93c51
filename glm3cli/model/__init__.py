"""ChatGLM3 as a megatron-core GPTModel.

Begin with `build`, which maps our configs to megatron-core's and builds this rank's model chunks.
Its layers are megatron-core's own, with these parts of ours: `layers` (RMSNorm, SwiGLU),
`attention` (core attention with `rotary` positions and `context` parallelism), `gpt` (the loss),
`noise` (on the embeddings), `mc2` (linear layers that communicate while they multiply), and
`adapters` (linear layers with low-rank adapters, and their `dropout`). `decoder` is the forward
pass of inference over the same weights, with a KV `cache`, and `quantized` makes weights of few
bits for it. All of them compute by the kernels of the active device. `plain` is the same forward
pass in plain torch, one weight at a time, which conversions are checked with.

A device must be active before anything but `plain` is imported. This room knows no files and no
data; it imports config/, device/ and megatron.core. train/, infer/, checkpoint/ and forecast/ use
it.
"""
