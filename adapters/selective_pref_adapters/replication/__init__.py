"""The paper's tables in miniature: every method with the same grid of rates, on several seeds, beside controls.

miniature   a language in which it is known which tokens decide; methods, and single runs of them
sweep       all runs, in several processes, none of them twice
tables      runs → means, intervals, paired differences
findings    tables → what they show, in sentences
plots       tables → figures
page        all of it on one page
command     `selective-pref replicate`
"""
