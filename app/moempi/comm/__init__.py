"""Rows over MPI: the exchange of a MoE layer, tensor groups, stage links, and the transports that they use."""
