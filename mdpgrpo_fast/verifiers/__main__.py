"""`python -m mdpgrpo_fast.verifiers`: say which sentence model answers; `--get-punkt` fetches NLTK's."""

import argparse
import sys

from .text.sentences import get_punkt, punkt_source


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mdpgrpo_fast.verifiers", description=__doc__)
    parser.add_argument("--get-punkt", action="store_true", help="fetch NLTK's punkt_tab data with NLTK's downloader")
    if parser.parse_args().get_punkt:
        try:
            get_punkt()
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
    print(punkt_source())
    return 0


if __name__ == "__main__":
    sys.exit(main())
