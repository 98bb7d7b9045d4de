"""Names of the files that say how a cell of a matrix ended, in its folder."""

FINISHED = ("predictions.csv", "metrics.json", "profile.json")
UNAVAILABLE = "unavailable.json"  # why it cannot run here
