"""The phases of a run beside its steps, as `World.alive` and with it the state and a hang report name them."""

INPUTS = "reading the inputs"
LAYOUT = "laying out the ranks"
LOADING = "loading the weights"
LANES = "making the lanes"
RECORDS = "gathering the records"
RESULTS = "writing the results"
