"""Training of the reference Transformer: the loop, its data, its checkpoints, and the programs over them.

schedule.py text.py tokens.py windows.py     how fast, and what is learnt from
loop.py world.py products.py                 the steps, on one process or several, the same each time
state.py curves.py progress.py               what a run leaves behind, and what it says meanwhile
options.py errors.py                         what somebody may ask for, and what may go wrong
lm.py lm_options.py lm_model.py              the program of `pyfuse train lm`
"""
