"""Adapters: a trainer's batch into the core's first arrow, the losses back into the trainer.

Importing this package imports no framework; each module imports the one that it serves.
"""
