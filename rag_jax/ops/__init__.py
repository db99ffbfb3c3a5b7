"""Array kernels: functions of arrays that are worth a file of their own, for speed, memory or exactness.

`attention`, `kv_cache` and `dropout` are what the layers of every network are made of; `matmul` and `float32_sums`
decide in which precision products and the sums of their gradients are computed; `vocab_loss` computes losses over a
vocabulary without holding its logits; `position_hash` draws the same random numbers on every mesh; `low_bit_adam` keeps
Adam's moments in 1 or 2 bytes. No parameters, no models.
"""
