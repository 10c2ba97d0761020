"""The only package that knows there is more than one process.

Read mesh, tensor, engine, checkpoint, saving, in that order.
"""
