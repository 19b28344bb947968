"""What a run will need, before it starts: exact steps, memory by part, disk, time, and changes that make it fit.

1. `prepare` has read, rendered and packed the rows. Steps, tokens and the largest micro-batch are counted from these
   packs, exactly (`forecast`).
2. The model is built without weights on torch's meta device, and its sizes are counted exactly (`meta_model`).
3. The largest micro-batch is run forward and backward on fake tensors through two decoder blocks and through three,
   and the bytes alive are counted; more blocks follow on a straight line (`activation_trace`, `attention_memory`).
4. Weights, gradients, optimizer state and activations are added up for each moment of a step; the largest sum is the
   plan (`memory`). It is compared with what the device has (`hardware`); traces are cached on disk (`forecast`).
5. `auto` values become the largest micro-batch and the least recomputation that fit (`resolve_auto`); where nothing
   fits, or memory runs out during training, changes are proposed (`suggestions`, `out_of_memory`).
6. Measured, not computed: what the process holds without a model, and tokens per second (`llmtune plan --measure`).
"""
