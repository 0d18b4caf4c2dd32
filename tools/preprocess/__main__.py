"""python -m megalm.tools.preprocess"""
import sys

from megalm.tools.preprocess import main

if __name__ == "__main__":  # a worker process imports this module again
    sys.exit(main())
