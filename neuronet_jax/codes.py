"""Every code that a message, a table or a page may show: what it means, and what to do.

`E_…` refuses an input, a store or a folder. `W_…` accepts it with a doubt. Programs select on the codes, so they stay.
"""

from typing import NamedTuple


class Code(NamedTuple):
    """The meaning of a code and its remedy, a sentence each. A `repair` changed the input instead of refusing it."""

    meaning: str
    remedy: str
    repair: bool = False


CODES = {
    # files of images and label maps
    "E_AFFINE": Code(
        "The voxel sizes or the affine in the header are invalid or contradict each other.",
        "Correct the header, or convert the scan from DICOM again.",
    ),
    "E_CONSTANT": Code("The image has the same value everywhere.", "Check that the right file was exported."),
    "E_CRC": Code(
        "The bytes differ from their checksum: the file, or a part of the store, is damaged.",
        "Copy or download the file again; build the shard of a store again with `data_prep.build … --repair`.",
    ),
    "E_DTYPE": Code(
        "The voxels are not plain integers or floats.", "Convert the image, for instance to 16-bit integers."
    ),
    "E_FORMAT": Code("The file is not a NIfTI or MGZ image.", "Convert it to .nii.gz, for instance with dcm2niix."),
    "E_HEADER": Code("A field of the header is invalid.", "Convert or download the image again."),
    "E_HEADER_SIZE": Code(
        "The header announces more voxels than a head can have.", "Check the file; it may be damaged or hostile."
    ),
    "E_INTERNAL": Code(
        "An unexpected exception occurred, which is probably a defect of this program.",
        "Report it with the message; the other inputs are not affected.",
    ),
    "E_IO": Code(
        "Reading or writing failed.", "Check that the path exists, that you may use it, and that the disk has room."
    ),
    "E_NAN": Code("Too many voxels are NaN or infinite.", "Run again the tool that made the image."),
    "E_NDIM": Code(
        "The image is not one three-dimensional volume.", "Extract the T1-weighted volume into its own file."
    ),
    "E_NO_XFORM": Code(
        "The header states no orientation, so left and right are unknown.",
        "Convert the scan again, or add `--assume-ras` if you know that its axes point right, anterior and superior.",
    ),
    "E_SCALE": Code("The intensity scaling in the header is invalid.", "Correct scl_slope and scl_inter."),
    "E_TRAILING": Code("Far too many bytes follow the voxels.", "Check the file; it may be damaged or hostile."),
    "E_TRUNCATED": Code("The file ends too early.", "Copy or download it again."),
    "E_UNITS": Code(
        "The voxel size or field of view does not fit a head, or is not in millimetres.",
        "Correct the units in the header, or check that the file holds a head.",
    ),
    "E_XFORM": Code(
        "The sform and qform of the file differ, and `--transform=reject` was given.",
        "Choose the right one with `--transform`, or correct the header.",
    ),
    "E_ZOOM": Code("The voxel sizes in the header and in the affine differ.", "Correct the header."),
    "W_INTENSITY": Code(
        "Stray bright voxels were clipped, or many voxels are negative.",
        "Check that the image is a T1-weighted magnitude image.",
    ),
    "W_LR_UNSAFE": Code(
        "The file states no orientation: RAS was assumed, so left and right are a guess.",
        "Do not rely on the sides unless you know the orientation.",
        repair=True,
    ),
    "W_NAN": Code(
        "Some voxels were NaN or infinite and were set to 0.", "Check whether they lie inside the head.", repair=True
    ),
    "W_NDIM": Code("Axes of length 1 after the third were dropped.", "Nothing needs to be done.", repair=True),
    "W_OBLIQUE": Code("The scan is tilted or sheared more than usual.", "Check the labels on the picture."),
    "W_XFORM": Code(
        "The sform and qform of the file differ; the sform was used unless an option chose the qform.",
        "Check that left, right and the position are correct.",
        repair=True,
    ),
    # labels that the network predicts
    "W_AGREEMENT": Code(
        "The two MALP-EM outputs contradict each other.", "Check both on the picture; the network is unsure."
    ),
    "W_BRAIN_VOLUME": Code(
        "The labelled volume is too small or too large for an adult brain (less than 0.6 or more than 2.1 litres).",
        "Too small: check that the brain is whole. Too large: neck or face is labelled; crop the scan to the head.",
    ),
    "W_CONTRAST": Code(
        "The image does not look T1-weighted: intensity should rise from CSF over grey to white matter.",
        "Check which sequence it is, and discard the labels if it is not T1-weighted.",
    ),
    "W_CUT": Code(
        "The brain ends at the border of the image.", "Do not use the volumes of structures there: they are too small."
    ),
    "W_NO_BRAIN": Code(
        "No brain is visible, or the share of grey matter does not fit a brain.",
        "Check that the file holds a head; discard the labels if it does not.",
    ),
    "W_PIECES": Code(
        "More than 10 ml of labels lay apart from the brain and were removed.",
        "Check the labels on the picture; `--no-clean-up` keeps such pieces.",
    ),
    "W_QUALITY": Code(
        "The predicted Dice is below the threshold from the run's validation subjects.",
        "Check the labels on the picture before you use them.",
    ),
    # the model and the machine
    "W_CHECKPOINT": Code(
        "The best checkpoint is damaged, so an earlier sound one was used.",
        "Train on from there, or copy the run again.",
    ),
    "W_DEVICE": Code("The requested accelerator cannot be used, so the CPU is.", "Check JAX_PLATFORMS and the driver."),
    "W_MEMORY": Code(
        "The device ran out of memory, so smaller tiles are used.", "Nothing needs to be done; it is only slower."
    ),
    "W_UNCALIBRATED": Code(
        "The predicted Dice is not calibrated for these weights.",
        "Run `python -m experiments.evaluate --run=RUN --calibrate`.",
    ),
    "E_NAMESAKE": Code(
        "A package `experiments` or `data_prep` of a different project takes the place of the one of this project.",
        "Run the program in a different folder or with `python -P -m`, or use an environment of its own.",
    ),
    "W_NAMESAKE": Code(
        "A folder `experiments` or `data_prep` is hidden by the package of this project.", "Rename the folder."
    ),
    # the cohort
    "E_CHANGED": Code(
        "Files have changed since the store was built from them.",
        "Add `--repair` to build their shards again, or build a new store at a different place.",
    ),
    "E_DUPLICATE": Code(
        "A subject or an image occurs twice.", "Keep one of them in the manifest, or exclude the second id."
    ),
    "E_GEOMETRY": Code(
        "A label map is on a different grid than its image.",
        "Provide the map on the image's grid, or add `--resample-labels`.",
    ),
    "E_ID": Code(
        "An id has characters other than ASCII letters and digits, or differs from another in case alone.",
        "Rename it.",
    ),
    "E_LABEL_EMPTY": Code("A label map is all background.", "Run the segmentation tool again."),
    "E_LABEL_FLOAT": Code("A label map holds values that are not integers.", "Export it without interpolation."),
    "E_LABEL_IMAGE": Code(
        "The file given as a scan is a label map.",
        "Give the scan itself; in a manifest, check the order of the columns.",
    ),
    "E_LABEL_SET": Code(
        "A label map holds ids that its tool does not use.",
        "Check that the map is in the right column of the manifest.",
    ),
    "E_LEAK": Code("One subject or image is in two splits.", "Give all visits of the subject one split."),
    "E_MISSING_MAP": Code(
        "Label maps of a subject are missing.", "Run the segmentation tool, or keep the subject with `--missing=keep`."
    ),
    "E_SPLIT": Code(
        "A split is missing, unknown or contradictory.",
        "Give every subject one of train, validation and test, or none.",
    ),
    "E_WITHDRAWN": Code(
        "The store holds participants who have withdrawn.", "Remove them with `python -m data_prep.purge`."
    ),
    "E_WORKER": Code(
        "Worker processes were killed again and again, perhaps because memory ran out.",
        "Give fewer `--workers`, or fewer subjects to a shard with `--shard-subjects`.",
    ),
    "E_ZIP": Code("A zip archive is damaged or hostile.", "Download it again."),
    "E_ZIP_MEMBER": Code(
        "A zip archive lacks the T1-weighted image, or has it twice.",
        "Nothing needs to be done where UK Biobank judged the scan unusable; otherwise download the archive again.",
    ),
    "W_TOOL": Code(
        "A tool that `--run-tools` ran failed on a scan, which stays without its label map.",
        "Read the tool's log in `--tools-out`, repair what it names, and give the same command again.",
    ),
    "W_CROPPED_LABEL": Code(
        "Labelled voxels lie outside the stored grid and were cut off.", "Choose a larger `--grid` if they matter."
    ),
    "W_LABEL_MISSING": Code(
        "A label map lacks a structure that every brain has.", "Check whether the segmentation tool failed there."
    ),
    "W_LR_SWAP": Code(
        "The left and right labels of a map are on the wrong sides.", "Check the orientation of the image and the map."
    ),
    "W_MISSING_MAP": Code(
        "Some label maps of the subject are missing; the others are used.", "Nothing needs to be done."
    ),
    "W_RESAMPLED": Code(
        "A label map was moved onto the image's grid by nearest voxel.", "Provide it on that grid for exact labels."
    ),
    "W_TISSUE_MISMATCH": Code(
        "The MALP-EM tissue map is not the merge of the MALP-EM structures.",
        "Check that both maps come from the same run of the tool.",
    ),
    # the store
    "E_EXISTS": Code(
        "The place holds something else already, such as a store of other input or settings.",
        "Choose a different place, or delete what is there.",
    ),
    "E_INCOMPLETE": Code("The store is not finished.", "Run the same `data_prep.build` command again."),
    "E_LEASE": Code("A different process uses this run or store.", "Wait for it, or stop it first."),
    "E_MISMATCH": Code(
        "The parts of the store do not fit together: one was changed or exchanged.",
        "Build the store again; for a changed subject, `data_prep.build … --repair` is enough.",
    ),
    "E_READ_ONLY": Code("A finished store is not written to.", "Build a new store at a different place."),
    "E_SCHEMA": Code(
        "The store was written by a release with a different format.", "Build it again, or use that release."
    ),
    "E_SHARD_MISSING": Code(
        "A shard of the store is not there.",
        "Run the same `data_prep.build` command again, with `--repair` if the store was finished.",
    ),
    "E_SYMLINK": Code("A link in the store leads out of it.", "Replace the link by the files."),
}


def explain(code: str) -> str:
    """Returns the meaning and the remedy of a code; empty for a code of a different release."""
    found = CODES.get(code)
    return f"{found.meaning} {found.remedy}" if found else ""


def page() -> str:
    """Returns the table as a page of the documentation."""
    lines = [
        "# Codes",
        "",
        "Messages, `summary.tsv`, `rejects.tsv` and reports name problems by stable codes: `E_…` is an error, `W_…` a",
        "warning. This page is written by `make codes`.",
        "",
        "| code | meaning | what to do |",
        "|---|---|---|",
    ]
    lines += [f"| `{name}` | {code.meaning} | {code.remedy} |" for name, code in sorted(CODES.items())]
    return "\n".join(lines) + "\n"
