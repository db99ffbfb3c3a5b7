"""A fictional world of passages and questions that cannot be answered from memory.

`world` decides what there is and writes it, the same for the same seed; `world_text` has the wordings; `world_tfds`
is the same world as a TensorFlow Datasets builder. The quickstart and many tests learn from it.
"""
