"""Models: the reference Transformer (`transformer`), real weights for it (`checkpoint`), the same on plain torch
(`stock`), and the two real models of the demo (`zoo`)."""
