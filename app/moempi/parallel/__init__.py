"""Where things are and how rows travel between ranks. The only room that knows MPI."""
