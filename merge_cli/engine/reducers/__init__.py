"""Reducers: each turns chunks of one kind into the bytes, or the values, of their outcome.

    kind of work                        on the CPU     on an accelerator
    weighted sums of plain tensors      cpu            pipeline, and cpu for chunks that it could not do
    tensors that are copied             copying        copying
    quantized tensors                   quantized      quantized, on the device
    inner products ("gram")             gram           gram

`kinds.py` chooses. A new reducer is one file here and one line there.
"""
