from kdpo_easyedit.cli.main import main

raise SystemExit(main())
