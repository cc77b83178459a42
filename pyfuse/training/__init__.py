"""Training of the reference Transformer: the loop, its data, its checkpoints, and the programs over them.

schedule.py text.py tokens.py windows.py     how fast, and what is learnt from
labelled.py texts.py order.py reviews.py     the same for labelled texts; a set of them; which rows a step has
loop.py products.py                          the steps, the same each time
world.py parallel.py sharded.py              one process or several, and how these hold the model
state.py curves.py progress.py               what a run leaves behind, and what it says meanwhile
options.py errors.py                         what somebody may ask for, and what may go wrong
program.py belonging.py                      a run in a folder, of whatever program, begun or gone on with
corpus.py model_options.py                   what several programs have in common: a text, a model and its sizes
lm.py lm_options.py                          the program of `pyfuse train lm`
mlm.py mlm_options.py masking.py             of `pyfuse train mlm`, and which tokens it hides
classifier.py classifier_options.py          of `pyfuse train classifier`, with metrics.py, how well it does
seq2seq.py seq2seq_options.py pairs.py       of `pyfuse train seq2seq`, with dates.py, what is translated
"""
