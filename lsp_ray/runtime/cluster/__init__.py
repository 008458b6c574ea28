"""Ray's processes: started, limited, ended, and cleared away after a run that was killed."""
