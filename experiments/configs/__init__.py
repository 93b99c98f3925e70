"""Named settings of the published comparison, one file each. `experiments.flags.load` finds them by name."""
