"""A small language in which it is known which tokens decide, and runs of every method in it.

language    facts, prompts, answers, pairs
judging     whether an answer is right, and which tokens decide
supervised  models that are trained on answers alone
worlds      what all runs of a seed share: pairs, a start, its references, their log-probs
methods     the rows of the tables: each a loss of what a step sees
trials      one run of one method, and what is measured of it
"""
