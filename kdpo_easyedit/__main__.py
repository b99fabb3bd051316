"""``python -m kdpo_easyedit``: the command line."""

from .cli.main import main

raise SystemExit(main())
