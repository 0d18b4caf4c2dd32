"""Programs run by hand; installed as `megalm.tools`, each with a `main(argv)`."""
