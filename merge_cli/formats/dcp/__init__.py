"""Torch distributed checkpoints (DCP): a folder with `.metadata` and `*.distcp` files, as
torchtitan, OLMo-core and Megatron write.

metadata   `.metadata`: tensors and the chunks that they are cut into, and the bytes of each chunk's item
item       one item: a torch.save archive of one tensor, whose values are plain bytes at an offset
folder     both together: an opened folder, and where the values of each chunk lie
clone      the same files around other values
"""
