"""Models: the reference Transformer (`transformer`), real weights into it (`checkpoint`, by the tables of `families`
and `configurations`) and out of it (`export`), the same on plain torch (`stock`), and the two real models of the demo
(`zoo`)."""
