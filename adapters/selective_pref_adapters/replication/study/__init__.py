"""The paper's tables in miniature: every method with the same grid of rates, on several seeds, beside controls.

worlds      what all runs of a seed share: pairs, a start, its references, their log-probs
methods     the rows of the tables: each a loss of what a step sees
trials      one run of one method, and what is measured of it
sweep       all runs, in several processes, none of them twice
tables      runs → means, intervals, paired differences
plots       the same as figures
command     `selective-pref replicate`
"""
