"""The name that report.py had before: python -m runtime.report RUN [RUN ...] does what python report.py does."""
from report import main

if __name__ == "__main__":
    main()
