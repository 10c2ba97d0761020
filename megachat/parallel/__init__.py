"""The only package that knows there is more than one process.

Read mesh, tensor, engine, checkpoint, in that order.
"""
