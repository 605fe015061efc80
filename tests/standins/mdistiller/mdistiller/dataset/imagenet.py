data_folder = "/nowhere"
