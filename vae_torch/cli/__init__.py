"""The command line: Hydra's entry points, launchers and messages. Nothing else imports this."""
