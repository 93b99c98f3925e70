"""`neuronet view`."""

import argparse
import webbrowser
from pathlib import Path
from typing import Any

from neuronet_jax.programs import DONE, number, some


def add(commands: Any) -> None:
    command = commands.add_parser(
        "view",
        help="look at results in a browser, and note which are good",
        description="Serves a folder of results on this machine alone, for a browser: each scan, its label maps over "
        "it, the structure under the cursor, and a note (good, bad or unsure) that is saved in OUT/qc.tsv. Ctrl-C ends "
        "it.",
        epilog="""\
examples:
  the results of `neuronet segment T1.nii.gz --out=labels`, over the scan that they were made from
    neuronet view labels T1.nii.gz

  a whole dataset
    neuronet view bids/derivatives/neuronet bids

  on a server without a screen; then open the printed address on your own machine
    ssh -L 8800:localhost:8800 SERVER neuronet view labels T1.nii.gz --port=8800 --no-browser

keys: n next head, p previous head, g good, b bad, u unsure
""",
    )
    command.add_argument("out", type=some(Path), metavar="OUT", help="the --out of `neuronet segment`")
    command.add_argument(
        "inputs",
        nargs="*",
        type=some(str),
        metavar="INPUT",
        help="the scans, as `neuronet segment` got them; results keep no copy of them",
    )
    command.add_argument(
        "--port", type=number(int, 0, 65535), default=0, metavar="N", help="port to listen on (default: any free one)"
    )
    command.add_argument("--no-browser", action="store_true", help="open no browser; the address is printed")
    command.set_defaults(command=_view)


def _view(args: argparse.Namespace) -> int:
    from neuronet_jax.viewer import catalogue
    from neuronet_jax.viewer.server import Server

    catalogue.check_folder(args.out)
    found = catalogue.catalogue(args.out, catalogue.images_of(args.out, args.inputs))
    missing = sum(scan["image"] is None for scan in found.scans)
    with Server(found, args.out, args.port) as server:
        print(f"{len(found.scans)} scans of {args.out}: {server.address}", flush=True)
        if missing and args.inputs:
            print(f"{missing} of them without a picture: their scans are not among the inputs, or were changed")
        print("Ctrl-C ends the viewer; notes are in qc.tsv", flush=True)
        if not args.no_browser:
            webbrowser.open(server.address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return DONE
