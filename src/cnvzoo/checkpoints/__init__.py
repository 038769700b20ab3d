"""Checkpoints: their format, where they are stored, loading, saving, publishing and verifying them.

Names are imported from the modules that define them, such as `cnvzoo.checkpoints.load`: listing checkpoints
(`cnvzoo.checkpoints.index`) needs no PyTorch.
"""
