"""A budget flows in (a configuration, a machine, data, time); what it will take and reach flows out. No torch."""
