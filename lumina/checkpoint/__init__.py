"""State (named tensors and plain values) flows in; verified folders on disk flow out, and back, to the bit.

A checkpoint that can be found is complete: it is written aside, hashed, and published by one rename.
"""
