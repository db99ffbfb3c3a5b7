"""Array kernels: functions of arrays that need care for speed, memory or exactness.

`attention`, `kv_cache` and `dropout` are used by the layers of every network. `matmul` and `float32_sums` decide in
which precision matmuls and the sums of their gradients are computed. `vocab_loss` computes losses over a vocabulary
without all its logits in memory. `position_hash` draws the same random numbers on every mesh. `low_bit_adam` stores
Adam's moments in 1 or 2 bytes. There are no parameters and no models here.
"""
