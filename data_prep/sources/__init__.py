"""Sources of subjects: a manifest, an archive of UK Biobank, a BIDS dataset.

Each module has one function that returns a list of `source.Source`, one for each visit of a participant, without
reading an image. A worker then opens the files.
"""
