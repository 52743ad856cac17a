"""The same comparison on real pairs, with small models that are trained on the spot.

start   files → data split by prompt, a tokenizer, the start, its references, a store of their log-probs
runs    methods × rates × seeds, each a run of the training job; what is measured of it on held-out pairs
tables  runs → tables, figures and pages
"""
